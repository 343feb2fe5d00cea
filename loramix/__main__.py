"""``python -m loramix``: the same as the command ``loramix``."""

from loramix.cli import main

if __name__ == "__main__":
    main()
