"""What a drawn program does in Python: lines of source, each kind for one place of the program.

The places are those of the template in ``source.py``. In ``forward`` the latent is ``x`` and the result ``h``; in the
loop ``denoiser`` is what the loop is given, ``i`` counts the evaluations, and ``h`` is the last prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Feature:
    """One thing that a denoiser or a loop does, as lines for the places of the template."""

    top: str = ""
    """Lines at the top of the module."""
    init: str = ""
    """Lines in the denoiser's ``__init__``."""
    methods: str = ""
    """Members of the denoiser's class."""
    enter: str = ""
    """Lines before the network is called, which may change ``x``."""
    leave: str = ""
    """Lines after it, which may change ``h``."""
    built: str = ""
    """Lines that run once ``denoiser`` is built."""
    begin: str = ""
    """Lines before the first evaluation of a run."""
    each: str = ""
    """Lines before each evaluation, which may change ``x``."""
    then: str = ""
    """Lines after each evaluation, which may change ``h``."""
    end: str = ""
    """Lines after the last evaluation, which may change ``latent``."""
    changes: Mapping[str, str] = field(default_factory=dict)
    """What may be changed between two calls of the sampler, by name."""
    works: bool = False
    """Whether it has to compile: to refuse it is a false alarm."""
    reuses: bool = True
    """Whether a schedule may reuse something: the reference replaces forwards, which some features do as well."""
    moves: bool = False
    """Whether a run leaves something behind that changes the next one."""
    values: bool = False
    """Whether it reads the condition ``value``."""
    slot: str = ""
    """A name that is equal for features of which a program has one at most."""


_STATE = {
    "counter nobody reads": Feature(init="self.calls = 0", enter="self.calls += 1"),
    "counter": Feature(
        init="self.calls = 0", enter="self.calls += 1", leave="h = h * (1 + 0.1 * (self.calls % 4))", moves=True
    ),
    "counter of runs": Feature(
        init="self.runs = 0", leave="h = h * (1 + 0.1 * self.runs)", end="denoiser.runs += 1", moves=True
    ),
    "counter in a buffer": Feature(
        init='self.register_buffer("count", torch.zeros(()))',
        enter="self.count += 1",
        leave="h = h * (1 + 0.1 * (self.count % 4)).to(h.dtype)",
        moves=True,
    ),
    "global counter": Feature(
        top="CALLS = 0", enter="global CALLS\nCALLS += 1", leave="h = h * (1 + 0.1 * (CALLS % 4))", moves=True
    ),
    "counter in a closure": Feature(
        top="""
            def make_counter():
                count = 0

                def tick():
                    nonlocal count
                    count += 1
                    return count

                return tick
            """,
        init="self.tick = make_counter()",
        leave="h = h * (1 + 0.1 * (self.tick() % 4))",
        moves=True,
    ),
    "counter of itertools": Feature(
        init="self.ticks = itertools.count(1)", leave="h = h * (1 + 0.1 * (next(self.ticks) % 4))", moves=True
    ),
    "counter in a default argument": Feature(
        top="""
            def grown(x, seen=[]):
                seen.append(None)
                return x * (1 + 0.1 * (len(seen) % 4))
            """,
        leave="h = grown(h)",
        moves=True,
    ),
    "counter of a function": Feature(
        top="""
            def counted(x):
                counted.calls += 1
                return x * (1 + 0.1 * (counted.calls % 4))

            counted.calls = 0
            """,
        leave="h = counted(h)",
        moves=True,
    ),
    "counter of another object": Feature(
        top="""
            class State:
                __slots__ = ("step",)

                def __init__(self):
                    self.step = 0
            """,
        init="self.state = State()",
        leave="self.state.step += 1\nh = h * (1 + 0.1 * (self.state.step % 4))",
        moves=True,
    ),
    "counter of the class": Feature(
        methods="total = 0",
        leave="type(self).total += 1\nh = h * (1 + 0.1 * (type(self).total % 4))",
        moves=True,
    ),
    "counter in an array": Feature(
        init="self.ticks = np.zeros(1)",
        leave="self.ticks += 1\nh = h * (1 + 0.1 * (float(self.ticks[0]) % 4))",
        moves=True,
    ),
    "counter in a tensor": Feature(
        init="self.ticks = torch.zeros(1, dtype=torch.float64)",
        leave="self.ticks += 1\nh = h * (1 + 0.1 * (self.ticks % 4))",
        moves=True,
    ),
    "counter of collections": Feature(
        init="self.counts = Counter()",
        leave='self.counts["calls"] += 1\nh = h * (1 + 0.1 * (self.counts["calls"] % 4))',
        moves=True,
    ),
    "counter by globals()": Feature(
        top="TOTAL = 0",
        leave='globals()["TOTAL"] += 1\nh = h * (1 + 0.1 * (globals()["TOTAL"] % 4))',
        moves=True,
    ),
    "counter of a generator": Feature(
        top="""
            def numbers():
                number = 0
                while True:
                    number += 1
                    yield number
            """,
        init="self.numbers = numbers()",
        leave="h = h * (1 + 0.1 * (next(self.numbers) % 4))",
        moves=True,
    ),
    "iterator over a list": Feature(
        init="self.rows = iter([0.1 * (index % 5) for index in range(1000)])",
        leave="h = h * (1 + next(self.rows))",
        moves=True,
    ),
    "counter of a thread": Feature(
        top="LOCAL = threading.local()\nLOCAL.calls = 0",
        leave="LOCAL.calls += 1\nh = h * (1 + 0.1 * (LOCAL.calls % 4))",
        moves=True,
    ),
    "counter of a context": Feature(
        top='CONTEXT = contextvars.ContextVar("CONTEXT", default=0)',
        leave="CONTEXT.set(CONTEXT.get() + 1)\nh = h * (1 + 0.1 * (CONTEXT.get() % 4))",
        moves=True,
    ),
    "counter of a cell behind a cell": Feature(
        top="""
            def outer():
                count = [0]

                def tick():
                    count[0] += 1
                    return count[0]

                def around():
                    return tick()

                return around
            """,
        init="self.around = outer()",
        leave="h = h * (1 + 0.1 * (self.around() % 4))",
        moves=True,
    ),
    "counter behind a descriptor": Feature(
        top="""
            class Ticking:
                counts = weakref.WeakKeyDictionary()

                def __get__(self, owner, kind=None):
                    self.counts[owner] = self.counts.get(owner, 0) + 1
                    return self.counts[owner]
            """,
        methods="ticking = Ticking()",
        leave="h = h * (1 + 0.1 * (self.ticking % 4))",
        moves=True,
    ),
    "last two results": Feature(
        init="self.recent = deque(maxlen=2)",
        leave="""
            if len(self.recent) == 2 and self.recent[0].shape == h.shape:
                h = h + 0.1 * self.recent[0]
            self.recent.append(h)
            """,
        moves=True,
    ),
    "set of shapes": Feature(
        init="self.shapes = set()",
        leave="h = h * (1 + 0.1 * (tuple(h.shape) in self.shapes))\nself.shapes.add(tuple(h.shape))",
        moves=True,
    ),
    "every second call": Feature(
        init="self.flag = False", leave="self.flag = not self.flag\nh = h * (1.1 if self.flag else 0.9)", moves=True
    ),
    "first call ever": Feature(
        init="self.warm = False", leave="h = h if self.warm else h * 0.9\nself.warm = True", moves=True
    ),
    "previous result": Feature(
        init="self.previous = None",
        leave="""
            if self.previous is not None and self.previous.shape == h.shape:
                h = h + 0.1 * self.previous
            self.previous = h
            """,
        moves=True,
    ),
    "result kept for nobody": Feature(init="self.kept = None", leave="self.kept = h"),
    "list of results": Feature(
        init="self.seen = []",
        leave="self.seen.append(h)\nh = h + 0.1 * (len(self.seen) % 3)",
        moves=True,
    ),
    "dict of results": Feature(
        init="self.seen = {}",
        leave="""
            if x.shape in self.seen:
                h = h + 0.1 * self.seen[x.shape]
            else:
                self.seen[x.shape] = h
            """,
        moves=True,
    ),
    "first result of a run": Feature(
        begin="denoiser.anchor = None",
        leave="""
            if self.anchor is None:
                self.anchor = h
            h = h + 0.1 * self.anchor
            """,
        init="self.anchor = None",
    ),
}
"""State that the denoiser keeps."""

_CACHES = {
    "table made at the first call": Feature(
        init="self.table = None",
        leave="""
            if self.table is None:
                self.table = torch.linspace(0.5, 1.0, h.shape[-1], dtype=h.dtype)
            h = h * self.table
            """,
    ),
    "tables by size": Feature(
        init="self.tables = {}",
        leave="""
            if h.shape[-1] not in self.tables:
                self.tables[h.shape[-1]] = torch.linspace(0.5, 1.0, h.shape[-1], dtype=h.dtype)
            h = h * self.tables[h.shape[-1]]
            """,
    ),
    "tables of the class": Feature(
        methods="shared_tables = {}",
        leave="""
            h = h * self.shared_tables.setdefault(h.shape[-1], torch.linspace(0.5, 1.0, h.shape[-1], dtype=h.dtype))
            """,
    ),
    "tables of the module": Feature(
        top="TABLES = {}",
        leave="""
            if h.shape[-1] not in TABLES:
                TABLES[h.shape[-1]] = torch.linspace(0.5, 1.0, h.shape[-1], dtype=h.dtype)
            h = h * TABLES[h.shape[-1]]
            """,
    ),
    "lru_cache of a function": Feature(
        top="""
            @functools.lru_cache
            def cached_table(size, dtype):
                return torch.linspace(0.5, 1.0, size, dtype=dtype)
            """,
        leave="h = h * cached_table(h.shape[-1], h.dtype)",
    ),
    "lru_cache of a method": Feature(
        methods="""
            @functools.lru_cache(maxsize=None)
            def own_table(self, size, dtype):
                return torch.linspace(0.5, 1.0, size, dtype=dtype)
            """,
        leave="h = h * self.own_table(h.shape[-1], h.dtype)",
    ),
    "lru_cache in the loop": Feature(
        top="""
            @functools.lru_cache
            def scale_of(index):
                return torch.tensor(1.0 + 0.1 * index, dtype=torch.float64)
            """,
        then="h = h * scale_of(i).to(h.dtype)",
    ),
    "cached_property": Feature(
        methods="""
            @functools.cached_property
            def ramp(self):
                return torch.linspace(0.5, 1.0, 4, dtype=torch.float64)
            """,
        leave="h = h * self.ramp.to(h.dtype)[0]",
    ),
    "submodule made at the first call": Feature(
        init="self.late = None",
        leave="""
            if self.late is None:
                self.late = nn.Linear(1, 1).to(h.dtype)
                nn.init.constant_(self.late.weight, 0.5)
            h = h * self.late.weight[0, 0]
            """,
    ),
}
"""Tables that are made when they are first needed."""

_CONSTANTS = {
    "global number": Feature(
        top="SCALE = 0.9",
        leave="h = h * SCALE",
        changes={"global number": "SCALE = 1.1"},
        works=True,
    ),
    "global tensor": Feature(
        top="OFFSET = torch.tensor([0.1], dtype=torch.float64)",
        leave="h = h + OFFSET.to(h.dtype)",
        changes={
            "global tensor assigned": "OFFSET = torch.tensor([0.2], dtype=torch.float64)",
            "global tensor written": "OFFSET.mul_(2)",
            "global tensor written through .data": "OFFSET.data.mul_(2)",
            "global tensor written through numpy": "OFFSET.numpy()[:] *= 2",
        },
    ),
    "number attribute": Feature(
        init="self.strength = 0.9",
        leave="h = h * self.strength",
        changes={
            "number attribute": "denoiser.strength = 1.1",
            "number attribute of another type": "denoiser.strength = torch.tensor(1.1, dtype=torch.float64)",
        },
        works=True,
    ),
    "tensor attribute": Feature(
        init="self.offset = torch.tensor([0.1], dtype=torch.float64)",
        leave="h = h + self.offset.to(h.dtype)",
        changes={
            "tensor attribute assigned": "denoiser.offset = torch.tensor([0.2], dtype=torch.float64)",
            "tensor attribute written": "denoiser.offset.mul_(2)",
            "tensor attribute written through .data": "denoiser.offset.data.mul_(2)",
            "tensor attribute written through numpy": "denoiser.offset.numpy()[:] *= 2",
        },
        works=True,
    ),
    "array attribute": Feature(
        init="self.array = np.array([0.1])",
        leave="h = h + torch.from_numpy(self.array).to(h.dtype)",
        changes={"array attribute written": "denoiser.array[0] = 0.3"},
    ),
    "list attribute": Feature(
        init="self.weights = [0.5, 0.4]",
        leave="h = h * sum(self.weights)",
        changes={
            "list attribute": "denoiser.weights[0] = 0.7",
            "longer list attribute": "denoiser.weights.append(0.2)",
        },
        works=True,
    ),
    "config object": Feature(
        init="self.config = SimpleNamespace(scale=0.9, inner=SimpleNamespace(shift=0.1))",
        leave="h = h * self.config.scale + self.config.inner.shift",
        changes={
            "config object": "denoiser.config.scale = 1.1",
            "inner config object": "denoiser.config.inner.shift = 0.3",
            "config object replaced": "denoiser.config = SimpleNamespace(scale=1.2, inner=denoiser.config.inner)",
        },
        works=True,
    ),
    "config dataclass": Feature(
        top="""
            @dataclasses.dataclass
            class Config:
                scale: float = 0.9
                names: tuple = ("a", "b")
            """,
        init="self.settings = Config()",
        leave="h = h * self.settings.scale * len(self.settings.names)",
        changes={
            "config dataclass": "denoiser.settings.scale = 1.1",
            "config dataclass replaced": 'denoiser.settings = dataclasses.replace(denoiser.settings, names=("a",))',
        },
        works=True,
    ),
    "config dict": Feature(
        init='self.kwargs = {"scale": 0.9, "more": {"shift": 0.1}}',
        leave='h = h * self.kwargs["scale"] + self.kwargs["more"]["shift"]',
        changes={
            "config dict": 'denoiser.kwargs["scale"] = 1.1',
            "inner config dict": 'denoiser.kwargs["more"]["shift"] = 0.3',
        },
        works=True,
    ),
    "partial attribute": Feature(
        top="def scaled(x, by):\n    return x * by",
        init="self.scaled = functools.partial(scaled, by=0.9)",
        leave="h = self.scaled(h)",
        changes={"partial attribute": "denoiser.scaled = functools.partial(scaled, by=1.1)"},
        works=True,
        slot="scaled",
    ),
    "function attribute": Feature(
        top="""
            def multiplier(by):
                return lambda x: x * by
            """,
        init="self.scaled = multiplier(0.9)",
        leave="h = self.scaled(h)",
        changes={
            "function attribute": "denoiser.scaled = multiplier(1.1)",
            "cell of a function": "denoiser.scaled.__closure__[0].cell_contents = 1.2",
        },
        works=True,
        slot="scaled",
    ),
    "property": Feature(
        top="FACTOR = 0.9",
        methods="@property\ndef factor(self):\n    return FACTOR",
        leave="h = h * self.factor",
        changes={
            "property": "type(denoiser).factor = property(lambda self: 1.2)",
            "global number behind a property": "FACTOR = 1.1",
        },
        works=True,
    ),
    "attribute of the class": Feature(
        methods="gain_of_class = 0.9",
        leave="h = h * self.gain_of_class",
        changes={
            "attribute of the class": "type(denoiser).gain_of_class = 1.1",
            "attribute of an instance over the class's": "denoiser.gain_of_class = 1.2",
        },
        works=True,
    ),
    "method of another object": Feature(
        top="""
            class Helper:
                def __init__(self):
                    self.by = 0.9

                def apply(self, x):
                    return x * self.by

            HELPER = Helper()
            """,
        init="self.apply_helper = HELPER.apply",
        leave="h = self.apply_helper(h)",
        changes={
            "object behind a bound method": "HELPER.by = 1.1",
        },
        works=True,
    ),
    "object with a method": Feature(
        top="""
            class Assistant:
                by = 0.9

                def apply(self, x):
                    return x * self.by
            """,
        init="self.assistant = Assistant()",
        leave="h = self.assistant.apply(h)",
        changes={
            "attribute of an object": "denoiser.assistant.by = 1.1",
            "attribute of an object's class": "Assistant.by = 1.2",
            "method of an object's class": "Assistant.apply = lambda self, x: x * self.by + 0.1",
        },
        works=True,
    ),
    "module outside the tree": Feature(
        top="HIDDEN = [nn.Linear(1, 1)]\nnn.init.constant_(HIDDEN[0].weight, 0.9)",
        init="self.outside = HIDDEN",
        leave="h = h * self.outside[0].weight[0, 0].to(h.dtype)",
        changes={
            "weight outside the tree": "with torch.no_grad():\n    HIDDEN[0].weight.mul_(1.5)",
            "weight outside the tree through .data": "HIDDEN[0].weight.data.mul_(1.5)",
            "module outside the tree replaced": "HIDDEN[0] = nn.Linear(1, 1)\nnn.init.constant_(HIDDEN[0].weight, 1.3)",
        },
    ),
    "buffer": Feature(
        init='self.register_buffer("shift", torch.tensor([0.1], dtype=torch.float64))',
        leave="h = h + self.shift.to(h.dtype)",
        changes={
            "buffer written": "denoiser.shift.mul_(2)",
            "buffer assigned": "denoiser.shift = denoiser.shift + 0.1",
            "buffer registered again": 'denoiser.register_buffer("shift", torch.tensor([0.5], dtype=torch.float64))',
        },
        works=True,
    ),
    "name of a method": Feature(
        init='self.method = "gentle"',
        methods="""
            def gentle(self, h):
                return h * 0.9

            def strong(self, h):
                return h * 1.1
            """,
        leave="h = getattr(self, self.method)(h)",
        changes={"name of a method": 'denoiser.method = "strong"'},
        works=True,
    ),
    "set of blocks": Feature(
        init="self.enabled = {0}",
        leave="h = h * 0.9 if 1 in self.enabled else h",
        changes={"set of blocks": "denoiser.enabled.add(1)"},
        works=True,
    ),
    "enum attribute": Feature(
        init="self.kind = Color.RED",
        leave="h = h * (0.9 if self.kind is Color.RED else 1.1)",
        changes={"enum attribute": "denoiser.kind = Level.LOW"},
        works=True,
    ),
    "getattr of the denoiser": Feature(
        init='self.__dict__["spare"] = 0.9',
        methods="""
            def __getattr__(self, name):
                if name == "extra":
                    return self.__dict__["spare"]
                return super().__getattr__(name)
            """,
        leave="h = h * self.extra",
        changes={"what __getattr__ gives": 'denoiser.__dict__["spare"] = 1.1'},
        works=True,
    ),
    "default dtype": Feature(
        leave="h = h * torch.tensor(1 / 3).to(h.dtype)",
        changes={"default dtype": "torch.set_default_dtype(torch.float64)"},
        works=True,
    ),
    "training flag": Feature(
        leave="h = h * (1.1 if self.training else 0.9)",
        changes={"train()": "denoiser.train()", "eval()": "denoiser.eval()"},
        works=True,
    ),
    "training flag of a submodule": Feature(
        init="self.gain = Gain()",
        leave="h = self.gain(h)",
        changes={"train() of a submodule": "denoiser.gain.train()", "eval() of a submodule": "denoiser.gain.eval()"},
        works=True,
        slot="gain",
    ),
    "parametrized weight": Feature(
        top="""
            class Doubled(nn.Module):
                def forward(self, weight):
                    return 2 * weight
            """,
        built='nn.utils.parametrize.register_parametrization(denoiser.head, "weight", Doubled())',
        changes={
            "parametrization removed": 'nn.utils.parametrize.remove_parametrizations(denoiser.head, "weight",'
            " leave_parametrized=False)"
        },
    ),
}
"""What the denoiser reads and does not change by itself."""

_HOOKS = {
    "hook that changes the result": Feature(
        built="HANDLES.append(denoiser.net.register_forward_hook(lambda module, args, output: output * 0.9))",
        changes={"hook removed": "HANDLES.pop().remove()"},
        works=True,
        slot="handle",
    ),
    "hook that changes the input": Feature(
        built="HANDLES.append(denoiser.net.register_forward_pre_hook(lambda module, args: (args[0] * 0.9, *args[1:])))",
        changes={"hook removed": "HANDLES.pop().remove()"},
        works=True,
        slot="handle",
    ),
    "hook with keywords": Feature(
        init="self.gain = Gain()",
        leave="h = self.gain(h, by=0.9)",
        built="""
            def stronger(module, args, kwargs):
                return args, {"by": kwargs["by"] + 0.1}

            HANDLES.append(denoiser.gain.register_forward_pre_hook(stronger, with_kwargs=True))
            """,
        changes={"hook removed": "HANDLES.pop().remove()"},
        works=True,
        slot="gain",
    ),
    "global hook": Feature(
        top="class Gate(nn.Module):\n    def forward(self, x):\n        return x",
        init="self.gate = Gate()",
        leave="h = self.gate(h)",
        built="""
            def everywhere(module, args, output):
                return output * 0.9 if type(module) is Gate else None

            HANDLES.append(nn.modules.module.register_module_forward_hook(everywhere))
            """,
        changes={"global hook removed": "HANDLES.pop().remove()"},
        slot="handle",
    ),
    "hook that stores what the loop reads": Feature(
        top="FEATURES = {}",
        init="self.gain = Gain()",
        leave="h = self.gain(h)",
        built="denoiser.gain.register_forward_hook(lambda module, args, output: FEATURES.update(h=output))",
        then='h = h + 0.1 * FEATURES["h"]',
        slot="gain",
    ),
    "attribute that the loop reads": Feature(
        init="self.last = None", leave="self.last = h * 0.5", then="h = h + 0.1 * denoiser.last"
    ),
    "call of a class": Feature(
        init="self.gain = Gain()",
        leave="h = self.gain(h)",
        changes={
            "call of a class replaced": "Gain.__call__ = lambda self, x: x * 0.7",
            "forward of a submodule's class replaced": "Gain.forward = lambda self, x: x * 0.7",
        },
        works=True,
        slot="gain",
    ),
    "forward of an instance": Feature(
        init="self.gain = Gain()",
        leave="h = self.gain(h)",
        built="denoiser.gain.forward = lambda x: x * 0.8",
        changes={
            "forward of an instance": "denoiser.gain.forward = lambda x: x * 0.7",
            "forward of an instance removed": "del denoiser.gain.forward",
        },
        works=True,
        slot="gain",
    ),
    "hook in the loop": Feature(
        init="self.gain = Gain()",
        leave="h = self.gain(h)",
        each="handle = denoiser.gain.register_forward_hook(lambda m, a, o: o * 1.1) if i == 1 else None",
        then="if handle is not None:\n    handle.remove()",
        slot="gain",
    ),
    "forward replaced in the loop": Feature(
        init="self.gain = Gain()",
        leave="h = self.gain(h)",
        each="if i == 1:\n    denoiser.gain.forward = lambda x: x * 1.2",
        end='denoiser.gain.__dict__.pop("forward", None)',
        slot="gain",
    ),
    "forward of a class replaced in the loop": Feature(
        init="self.gain = Gain()",
        leave="h = self.gain(h)",
        begin="plain = Gain.forward",
        each="if i == 1:\n    Gain.forward = lambda self, x: x * 1.2",
        end="Gain.forward = plain",
        slot="gain",
    ),
}
"""Hooks and forwards that are not those of the class."""

_EXCEPTIONS = {
    "caught error of its own": Feature(
        leave="""
            try:
                raise ValueError("planted")
            except ValueError:
                h = h * 0.9
            """,
        works=True,
    ),
    "missing attribute": Feature(
        leave="""
            try:
                h = h * self.absent
            except AttributeError:
                h = h * 0.9
            """,
        works=True,
    ),
    "branch on values that is caught": Feature(
        leave="""
            try:
                h = h * (0.9 if h.sum() > -1e9 else 0.8)
            except Exception:
                h = h * 0.7
            """
    ),
    "number of a tensor that is suppressed": Feature(
        leave="""
            with contextlib.suppress(Exception):
                h = h * (0.9 + 0.0 * float(h.sum()))
            """
    ),
    "branch in the loop that is caught": Feature(
        then="""
            try:
                h = h * (0.9 if h.sum() > -1e9 else 0.8)
            except Exception:
                h = h * 0.7
            """
    ),
    "number in the loop that is suppressed": Feature(
        then="with contextlib.suppress(ValueError):\n    h = h * (0.9 + 0.0 * h.sum().item())"
    ),
    "call that is caught": Feature(
        init="self.fails_once = True",
        enter="""
            if self.fails_once:
                self.fails_once = False
                raise RuntimeError("planted")
            """,
        begin="""
            with contextlib.suppress(RuntimeError):
                denoiser(noise, torch.zeros(noise.shape[0], dtype=noise.dtype))
            """,
        reuses=False,
        moves=True,
    ),
    "swallowed at the end": Feature(
        end="""
            try:
                latent = latent if float(latent.mean()) < 1e9 else latent * 0
            except BaseException:
                latent = latent * 0.5
            """
    ),
}
"""Errors as a way to choose a branch."""

_RESULTS = {
    "dataclass as result": Feature(
        top="@dataclasses.dataclass\nclass Output:\n    sample: object\n    scale: float = 0.9",
        leave="h = Output(h)",
        then="h = h.sample * h.scale",
        slot="result",
    ),
    "dict subclass as result": Feature(
        top="""
            class Output(OrderedDict):
                def __getattr__(self, name):
                    try:
                        return self[name]
                    except KeyError:
                        raise AttributeError(name) from None
            """,
        leave="h = Output(sample=h)",
        then="h = h.sample",
        slot="result",
    ),
    "namedtuple as result": Feature(
        top='Output = namedtuple("Output", ["sample", "scale"])',
        leave="h = Output(h, 0.9)",
        then="h = h.sample * h.scale",
        slot="result",
        works=True,
    ),
    "object as result": Feature(leave="h = SimpleNamespace(sample=h)", then="h = h.sample", slot="result"),
    "dict as result": Feature(
        leave='h = {"sample": h, "scale": 0.9}', then='h = h["sample"] * h["scale"]', slot="result", works=True
    ),
    "counter as result": Feature(
        init="self.number = 0",
        leave="self.number += 1\nh = (h, self.number)",
        then="h = h[0] * (1 + 0.1 * (h[1] % 4))",
        slot="result",
        moves=True,
    ),
    "tensor written into a global": Feature(
        top="BOX = {}",
        enter='BOX["mean"] = x.mean()',
        then='h = h + 0.1 * BOX["mean"]',
    ),
}
"""What a denoiser returns."""

_LOOP_STATE = {
    "step of the denoiser": Feature(
        init="self.step = 0", leave="h = h * (1 + 0.1 * self.step)", each="denoiser.step = i", slot="step"
    ),
    "step that ends as it was": Feature(
        init="self.step = 0",
        leave="h = h * (1 + 0.1 * self.step)",
        each="denoiser.step = i",
        end="denoiser.step = 0",
        slot="step",
    ),
    "mode of the denoiser": Feature(
        init="self.mode = 0",
        methods="def set_mode(self, mode):\n    self.mode = mode",
        leave="h = h * (1 + 0.1 * self.mode)",
        each="denoiser.set_mode(i % 2)",
    ),
    "train and eval in the loop": Feature(
        leave="h = h * (1.1 if self.training else 0.9)", each="denoiser.train(i == 1)", end="denoiser.eval()"
    ),
    "config written in the loop": Feature(
        init="self.plan = SimpleNamespace(index=0)",
        leave="h = h * (1 + 0.1 * self.plan.index)",
        each="denoiser.plan.index = i",
        end="denoiser.plan.index = 0",
    ),
    "step in a global": Feature(top="STEP = [0]", leave="h = h * (1 + 0.1 * STEP[0])", each="STEP[0] = i"),
    "log of the loop": Feature(top="LOG = []", then="LOG.append(h)"),
    "list of the loop": Feature(
        top="PAST = []",
        then="""
            PAST.append(h)
            if len(PAST) > 1 and PAST[-2].shape == h.shape:
                h = h + 0.1 * PAST[-2]
            """,
        moves=True,
    ),
    "count of the loop's runs": Feature(
        top="RUNS = [0]", end="RUNS[0] += 1\nlatent = latent * (1 + 0.1 * RUNS[0])", moves=True
    ),
    "weights swapped in": Feature(
        begin="""
            kept = [p.detach().clone() for p in denoiser.net.parameters()]
            with torch.no_grad():
                for p in denoiser.net.parameters():
                    p.mul_(1.1)
            """,
        end="""
            with torch.no_grad():
                for p, old in zip(denoiser.net.parameters(), kept):
                    p.copy_(old)
            """,
        slot="swap",
    ),
    "weights swapped in half-way": Feature(
        each="""
            if i == 1:
                denoiser.kept = [p.detach().clone() for p in denoiser.net.parameters()]
                for p in denoiser.net.parameters():
                    p.data.mul_(1.1)
            """,
        end="for p, old in zip(denoiser.net.parameters(), denoiser.kept):\n    p.data.copy_(old)",
        slot="swap",
    ),
    "weights assigned through .data": Feature(
        begin="""
            kept = [p.data for p in denoiser.net.parameters()]
            for p in denoiser.net.parameters():
                p.data = p.data * 1.1
            """,
        end="for p, old in zip(denoiser.net.parameters(), kept):\n    p.data = old",
        slot="swap",
    ),
    "weights loaded half-way": Feature(
        each="""
            if i == 1:
                denoiser.kept = {name: value.clone() for name, value in denoiser.net.state_dict().items()}
                denoiser.net.load_state_dict({name: value * 1.1 for name, value in denoiser.kept.items()})
            """,
        end="denoiser.net.load_state_dict(denoiser.kept)",
        slot="swap",
    ),
    "submodule swapped half-way": Feature(
        init="self.gain, self.other = Gain(), nn.Tanh()",
        leave="h = self.gain(h)",
        each="if i == 1:\n    denoiser.gain, denoiser.other = denoiser.other, denoiser.gain",
        end="denoiser.gain, denoiser.other = denoiser.other, denoiser.gain",
        slot="gain",
    ),
}
"""What the loop writes between evaluations."""

_RANDOM = {
    "draws of torch": Feature(then="h = h + 0.01 * torch.randn_like(h)", works=True),
    "draw of random": Feature(then="h = h * (1 + 0.1 * random.random())"),
    "draw of random before the loop": Feature(
        begin="start = random.random()", end="latent = latent * (1 + 0.1 * start)"
    ),
    "draw of numpy": Feature(then="h = h * (1 + 0.1 * np.random.rand())"),
    "draw of a generator of numpy": Feature(
        begin="generator = np.random.default_rng(3)", then="h = h * (1 + 0.1 * generator.random())"
    ),
    "draw of a generator of torch": Feature(
        begin="own = torch.Generator().manual_seed(3)",
        then="h = h + 0.01 * torch.randn(h.shape, generator=own, dtype=h.dtype)",
    ),
    "seed in the loop": Feature(each="torch.manual_seed(i)", then="h = h + 0.01 * torch.randn_like(h)"),
    "seed of the caller in the loop": Feature(begin="torch.manual_seed(7)", then="h = h + 0.01 * torch.randn_like(h)"),
    "fork_rng in the loop": Feature(
        then="""
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(i)
                h = h + 0.01 * torch.randn_like(h)
            """
    ),
    "random state put back": Feature(
        begin="state = torch.get_rng_state()",
        then="h = h + 0.01 * torch.randn_like(h)",
        end="torch.set_rng_state(state)",
    ),
    "seeds of random in the loop": Feature(each="random.seed(i)", then="h = h * (1 + 0.1 * random.random())"),
    "draw of random in the denoiser": Feature(leave="h = h * (1 + 0.1 * random.random())"),
    "draw of numpy in the denoiser": Feature(leave="h = h * (1 + 0.1 * np.random.rand())"),
    "draw of torch in the denoiser": Feature(leave="h = h + 0.01 * torch.randn_like(h)"),
    "shuffle in the loop": Feature(
        begin="order = list(range(4))\nrandom.shuffle(order)", then="h = h * (1 + 0.1 * order[i % 4])"
    ),
}
"""Random numbers of all kinds."""

_CLOSURES = {
    "number in a closure": Feature(
        top="CLOSED = SimpleNamespace(number=0.9)\nGUIDANCE = 0.9",
        then="h = h * GUIDANCE",
        changes={"number of the loop": "GUIDANCE = 1.1"},
        works=True,
    ),
    "cell of the loop": Feature(
        top="""
            def make_scaler():
                by = 0.9

                def scaler(x):
                    return x * by

                def set_by(value):
                    nonlocal by
                    by = value

                return scaler, set_by

            SCALER, SET_BY = make_scaler()
            """,
        then="h = SCALER(h)",
        changes={"cell of the loop": "SET_BY(1.1)"},
        works=True,
    ),
    "object of the loop": Feature(
        top="SETTINGS = SimpleNamespace(scale=0.9)",
        then="h = h * SETTINGS.scale",
        changes={"object of the loop": "SETTINGS.scale = 1.1"},
        works=True,
    ),
    "list of numbers of the loop": Feature(
        top="COEFFICIENTS = [0.9, 0.8, 0.7]",
        then="h = h * COEFFICIENTS[i % len(COEFFICIENTS)]",
        changes={
            "list of the loop": "COEFFICIENTS[1] = 1.1",
            "longer list of the loop": "COEFFICIENTS.insert(0, 1.2)",
        },
        works=True,
    ),
    "dict of the loop": Feature(
        top='OPTIONS = {"scale": 0.9}',
        then='h = h * OPTIONS["scale"]',
        changes={"dict of the loop": 'OPTIONS["scale"] = 1.1'},
        works=True,
    ),
    "tensor of the loop": Feature(
        top="SIGMAS = torch.linspace(0.5, 1.0, 6, dtype=torch.float64)",
        then="h = h * SIGMAS[i].to(h.dtype)",
        changes={
            "tensor of the loop written": "SIGMAS.mul_(1.1)",
            "tensor of the loop through .data": "SIGMAS.data.mul_(1.1)",
            "tensor of the loop through numpy": "SIGMAS.numpy()[:] *= 1.1",
            "tensor of the loop assigned": "SIGMAS = SIGMAS * 1.1",
        },
        works=True,
    ),
    "array of the loop": Feature(
        top="BETAS = np.linspace(0.5, 1.0, 6)",
        then="h = h * float(BETAS[i])",
        changes={"array of the loop": "BETAS *= 1.1"},
        works=True,
    ),
    "second module": Feature(
        top="""
            CONTROL = nn.Linear(4, 4).to(torch.float64)
            with torch.no_grad():
                CONTROL.weight.fill_(0.1)
                CONTROL.bias.fill_(0.1)
            """,
        then="h = h + CONTROL.weight.mean().to(h.dtype) * x",
        changes={
            "weight of a second module": "with torch.no_grad():\n    CONTROL.weight.mul_(2)",
            "weight of a second module through .data": "CONTROL.weight.data.mul_(2)",
            "weight of a second module assigned": "CONTROL.weight = nn.Parameter(CONTROL.weight.detach() * 2)",
        },
    ),
    "control net": Feature(
        top="""
            class ControlNet(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.scale = nn.Parameter(torch.tensor([0.1], dtype=torch.float64))

                def forward(self, x):
                    return torch.tanh(x) * self.scale.to(x.dtype)

            CONTROL_NET = ControlNet()
            """,
        then="h = h + CONTROL_NET(x)",
        changes={
            "weight of a control net": "with torch.no_grad():\n    CONTROL_NET.scale.mul_(2)",
            "weight of a control net by a fused optimizer": "fused_step(CONTROL_NET.parameters())",
            "hook of a control net": "CONTROL_NET.register_forward_hook(lambda m, a, o: o * 2)",
        },
    ),
    "decoder": Feature(
        top="DECODER = nn.Sequential(nn.Tanh())",
        end="latent = DECODER(latent)",
        changes={
            "decoder": "DECODER.append(nn.Sigmoid())",
            "hook of a decoder": "DECODER[0].register_forward_hook(lambda m, a, o: o * 2)",
        },
    ),
    "partial of the loop": Feature(
        top="""
            def weighed(x, by):
                return x * by

            WEIGH = functools.partial(weighed, by=0.9)
            """,
        then="h = WEIGH(h)",
        changes={"partial of the loop": "WEIGH = functools.partial(weighed, by=1.1)"},
        works=True,
    ),
    "bound method of the loop": Feature(
        top="""
            class Stepper:
                def __init__(self):
                    self.size = 0.9

                def step(self, h):
                    return h * self.size

            STEP_BY = Stepper().step
            """,
        then="h = STEP_BY(h)",
        changes={"object of a method of the loop": "STEP_BY.__self__.size = 1.1"},
        works=True,
    ),
    "function of the loop": Feature(
        top="def transform(h):\n    return h * 0.9",
        then="h = transform(h)",
        changes={
            "function of the loop": "def transform(h):\n    return h * 1.1",
            "code of a function": "transform.__code__ = (lambda h: h * 1.2).__code__",
        },
        works=True,
    ),
    "default of a function": Feature(
        top="def amplify(h, by=0.9):\n    return h * by",
        then="h = amplify(h)",
        changes={"default of a function": "amplify.__defaults__ = (1.1,)"},
        works=True,
    ),
    "scheduler that steps": Feature(
        top="""
            class Scheduler:
                def __init__(self):
                    self.index = 0

                def step(self, h):
                    self.index += 1
                    return h * (1 + 0.1 * (self.index % 4))

            SCHEDULER = Scheduler()
            """,
        then="h = SCHEDULER.step(h)",
        moves=True,
    ),
    "scheduler that is set": Feature(
        top="""
            class Scheduler:
                def set_timesteps(self):
                    self.index, self.outputs = 0, []

                def step(self, h):
                    self.index += 1
                    self.outputs.append(h)
                    return h * (1 + 0.1 * self.index)

            SCHEDULER = Scheduler()
            """,
        begin="SCHEDULER.set_timesteps()",
        then="h = SCHEDULER.step(h)",
    ),
}
"""What the loop reads from outside."""

_CONDITIONS = {
    "value in the loop": Feature(then="h = h * number_of(value)", values=True, works=True),
    "value in the denoiser": Feature(
        leave="h = h * number_of(self.value)", init="self.value = None", values=True, each="denoiser.value = value"
    ),
    "value given to the denoiser": Feature(leave="h = h * number_of(value)", values=True, works=True, slot="given"),
    "parameter that the loop reads": Feature(
        init="self.null = nn.Parameter(torch.full((4,), 0.1, dtype=torch.float64))",
        then="h = h + denoiser.null[None].mean().to(h.dtype)",
        changes={
            "parameter that the loop reads": "with torch.no_grad():\n    denoiser.null.mul_(2)",
            "parameter that the loop reads, through .data": "denoiser.null.data.mul_(2)",
        },
    ),
    "expanded parameter that the loop reads": Feature(
        init="self.empty = nn.Parameter(torch.full((1,), 0.1, dtype=torch.float64))",
        end="latent = latent + denoiser.empty.to(latent.dtype).expand(latent.shape[-1])",
        changes={
            "expanded parameter": "with torch.no_grad():\n    denoiser.empty.mul_(2)",
            "expanded parameter by a fused optimizer": "fused_step([denoiser.empty])",
        },
    ),
    "embedding that the loop calls": Feature(
        init="self.words = nn.Embedding(3, 1).to(torch.float64)\nnn.init.constant_(self.words.weight, 0.1)",
        then="h = h + denoiser.words(torch.tensor([1])).to(h.dtype)[0, 0]",
        changes={"embedding": "with torch.no_grad():\n    denoiser.words.weight.mul_(2)"},
    ),
    "number that the loop reads": Feature(
        init="self.sigma = 0.9",
        then="h = h * denoiser.sigma",
        changes={"number that the loop reads": "denoiser.sigma = 1.1"},
        works=True,
    ),
    "timestep written through numpy": Feature(
        begin="clock = np.zeros(1)\ntick = torch.from_numpy(clock)",
        each="clock[0] = i",
        then="h = h + tick",
    ),
    "timestep written through .data": Feature(
        begin="tick = torch.zeros(1, dtype=torch.float64)",
        each="tick.data.fill_(i)",
        then="h = h + tick",
    ),
    "timestep written in place": Feature(
        begin="tick = torch.zeros(1, dtype=torch.float64)",
        each="tick.fill_(i)",
        then="h = h + tick",
        works=True,
    ),
    "latent written in place": Feature(each="x = x.clone()\nx.mul_(0.9)", works=True),
    "noise written in place": Feature(begin="noise.mul_(0.9)", works=True),
    "constant as result": Feature(
        end="latent = torch.full((1,), 0.5, dtype=latent.dtype).expand_as(latent)", works=True
    ),
    "noise given twice": Feature(begin="noise.mul_(0.9)", then="h = h + 0.1 * again", slot="again"),
}
"""What comes with the call, and weights that the loop reads itself."""

_LOOPS = {
    "loop without gradients": Feature(built="loop = torch.no_grad()(loop)", works=True, slot="loop"),
    "loop in inference mode": Feature(built="loop = torch.inference_mode()(loop)", slot="loop"),
    "loop as a partial": Feature(
        built="""
            def strengthened(denoiser, noise, by, **given):
                return loop_at_first(denoiser, noise, **given) * by

            loop = functools.partial(strengthened, by=0.9)
            """,
        changes={"keyword of the loop": 'loop.keywords["by"] = 1.1'},
        works=True,
        slot="loop",
    ),
    "loop as an object": Feature(
        built="""
            class Sampler:
                def __init__(self):
                    self.by = 0.9

                def __call__(self, denoiser, noise, **given):
                    return loop_at_first(denoiser, noise, **given) * self.by

            loop = Sampler()
            """,
        changes={"attribute of the loop": "loop.by = 1.1"},
        works=True,
        slot="loop",
    ),
    "loop as an object that counts": Feature(
        built="""
            class Sampler:
                runs = 0

                def __call__(self, denoiser, noise, **given):
                    self.runs += 1
                    return loop_at_first(denoiser, noise, **given) * (1 + 0.1 * (self.runs % 4))

            loop = Sampler()
            """,
        moves=True,
        slot="loop",
    ),
    "loop as a bound method": Feature(
        built="""
            class Pipeline:
                def __init__(self):
                    self.config = {"by": 0.9}

                def sample(self, denoiser, noise, **given):
                    return loop_at_first(denoiser, noise, **given) * self.config["by"]

            loop = Pipeline().sample
            """,
        changes={"config of the loop's object": 'loop.__self__.config["by"] = 1.1'},
        works=True,
        slot="loop",
    ),
    "loop as a module": Feature(
        built="""
            class LoopModule(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.by = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

                def forward(self, denoiser, noise, **given):
                    return loop_at_first(denoiser, noise, **given) * self.by

            loop = LoopModule()
            """,
        changes={
            "weight of the loop": "with torch.no_grad():\n    loop.by.mul_(1.1)",
            "weight of the loop through .data": "loop.by.data.mul_(1.1)",
            "hook of the loop": "loop.register_forward_hook(lambda module, args, output: output * 1.1)",
        },
        slot="loop",
    ),
    "loop in a cell": Feature(
        built="""
            def around(inner, by):
                @functools.wraps(inner)
                def wrapper(denoiser, noise, **given):
                    return inner(denoiser, noise, **given) * by[0]

                return wrapper

            loop = around(loop, [0.9])
            """,
        changes={"list in a cell of the loop": "loop.__closure__[0].cell_contents[0] = 1.1"},
        works=True,
        slot="loop",
    ),
}
"""What kind of callable the loop is."""

_QUESTIONS = {
    "signature of the denoiser": Feature(
        then="h = h * (1 + 0.1 * len(inspect.signature(denoiser.forward).parameters))", reuses=False
    ),
    "type of the denoiser": Feature(then="h = h * (1.1 if type(denoiser) is Denoiser else 0.9)"),
    "class of the denoiser": Feature(then="h = h * (1.1 if isinstance(denoiser, Denoiser) else 0.9)", works=True),
    "attributes of the denoiser": Feature(then='h = h * (1.1 if "training" in vars(denoiser) else 0.9)'),
    "missing attribute of the denoiser": Feature(
        then='h = h * (1.1 if hasattr(denoiser, "absent") else 0.9)', works=True
    ),
    "submodule that the loop calls": Feature(init="self.gain = Gain()", then="h = denoiser.gain(h)", slot="gain"),
    "device and dtype of a weight": Feature(
        then="h = h.to(next(denoiser.parameters()).device, next(denoiser.parameters()).dtype)", works=True
    ),
}
"""What the loop asks of the denoiser."""

FEATURES: Mapping[str, Feature] = {
    **_STATE,
    **_CACHES,
    **_CONSTANTS,
    **_HOOKS,
    **_EXCEPTIONS,
    **_RESULTS,
    **_LOOP_STATE,
    **_RANDOM,
    **_CLOSURES,
    **_CONDITIONS,
    **_LOOPS,
    **_QUESTIONS,
}
"""All features by name."""

VALUES = (
    "None",
    "1",
    "1.0",
    "True",
    "0",
    "False",
    "0.0",
    "-0.0",
    "np.float64(0.0)",
    "np.float64(-0.0)",
    "np.float32(1.0)",
    "np.int64(1)",
    "Decimal('1.0')",
    "Decimal('1.00')",
    "Fraction(1)",
    "complex(0.0, 0.0)",
    "complex(-0.0, 0.0)",
    "frozenset({1})",
    "frozenset({1.0})",
    "(1, 0.0)",
    "(1.0, -0.0)",
    "'text'",
    "torch.float32",
    "float('nan')",
    "range(3)",
    "Point(1, 2)",
    "Point(1.0, 2)",
    "MUTABLE",
    "[1, 2.0]",
    "{'a': 0.0}",
    "Color.RED",
    "Level.LOW",
)
"""Values of the condition ``value``, as source: many are equal, and each is another value."""
