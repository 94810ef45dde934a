"""`python -m video_trl` is the command `video-trl`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
