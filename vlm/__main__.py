"""``python -m vlm`` is the command ``vlm``."""

import sys

from vlm.commands import main

sys.exit(main())
