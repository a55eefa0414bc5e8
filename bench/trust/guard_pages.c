/* An allocator for LD_PRELOAD that puts every aligned block, as torch's tensors are, between pages nobody may touch.
 *
 * Whatever reads or writes outside a block, or in one that was freed, ends the process at once. A block ends where a
 * page ends, to 16 bytes, or begins where one begins, as guard_pages_set says; it is filled with one byte, so that what
 * was never written differs between two runs. Addresses are used once only. All other memory is left to the C library.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE 4096ull
#define ROOM (1ull << 40)
#define GUARD_PAGES 16ull

static char *room;
static uint64_t *sizes; /* pages of the block that begins in a page of the room */
static atomic_ullong next_page = 1;
static atomic_int begins_at_page, fill;

__attribute__((constructor)) static void reserve(void) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    room = mmap(NULL, ROOM, PROT_NONE, flags, -1, 0);
    sizes = mmap(NULL, ROOM / PAGE * sizeof *sizes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (room == MAP_FAILED || sizes == MAP_FAILED) room = NULL;
}

void guard_pages_set(int begins, int byte) {
    begins_at_page = begins;
    fill = byte;
}

int posix_memalign(void **result, size_t alignment, size_t size) {
    if (room == NULL || alignment > PAGE) return ENOMEM;
    uint64_t pages = (size + PAGE - 1) / PAGE + (size == 0);
    uint64_t first = atomic_fetch_add(&next_page, pages + GUARD_PAGES) + GUARD_PAGES;
    if ((first + pages + GUARD_PAGES) * PAGE > ROOM) return ENOMEM;
    char *block = room + first * PAGE;
    if (mprotect(block, pages * PAGE, PROT_READ | PROT_WRITE) != 0) return ENOMEM;
    memset(block, fill, pages * PAGE);
    size_t space = (size + 15) / 16 * 16;
    char *address = begins_at_page ? block : block + pages * PAGE - space;
    sizes[(address - room) / PAGE] = pages;
    *result = address;
    return 0;
}

static int is_ours(void *address) {
    return room != NULL && (char *)address >= room && (char *)address < room + ROOM;
}

void free(void *address) {
    static void (*next)(void *);
    if (!is_ours(address)) {
        if (next == NULL) next = (void (*)(void *))dlsym(RTLD_NEXT, "free");
        next(address);
        return;
    }
    uint64_t page = ((char *)address - room) / PAGE, pages = sizes[page];
    if (pages == 0) __builtin_trap(); /* freed twice, or not a block */
    sizes[page] = 0;
    madvise(room + page * PAGE, pages * PAGE, MADV_DONTNEED);
    mprotect(room + page * PAGE, pages * PAGE, PROT_NONE);
}
