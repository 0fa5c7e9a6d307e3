import atexit
import os
import sys

from .run import main

code = main()
# some of its threads outlive their owners and abort a normal exit, after all work is done
if "deepspeed" in sys.modules:
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
sys.exit(code)
