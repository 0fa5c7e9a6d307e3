"""`python -m vica`: the `vica` program."""

import sys

from .cli.main import main

sys.exit(main())
