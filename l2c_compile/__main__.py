"""``python -m l2c_compile`` is ``l2c``."""

from l2c_compile.cli.main import main

if __name__ == "__main__":
    main()
