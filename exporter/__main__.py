"""``python -m exporter`` is ``mobilellm``."""

from exporter.cli import main

if __name__ == "__main__":
    main()
