import atexit
import os
import sys

from .run import main

code = main()
if "deepspeed" in sys.modules:  # some of its threads outlive their owners and abort an ordinary exit, all work done
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
