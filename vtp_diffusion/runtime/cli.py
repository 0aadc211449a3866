"""How the programs end when their input is at fault: one message, exit status 2, and no traceback."""

import atexit
import gc
import os
import sys
import traceback
from collections.abc import Callable

from .optional_packages import MissingExtraError

TRACEBACK_VARIABLE = "VTP_DIFFUSION_TRACEBACK"
# What this package and its libraries raise for wrong input (values, files). Any other exception is a bug.
INPUT_ERRORS = (ValueError, OSError, MissingExtraError)
GARBAGE_OBJECTS = 50_000  # new objects between two runs of the garbage collector; Python's default is 700


def run(main: Callable[[], None]) -> None:
    """Call the `main` of a program.

    A `ValueError`, an `OSError` or a missing extra is printed as `error: ...` with the place that raised it, and the
    program exits with status 2, as for a wrong option; Ctrl-C is one line, with the text of a `KeyboardInterrupt` that
    has one (what is kept), and status 130. With VTP_DIFFUSION_TRACEBACK=1 in the environment, and for every other
    exception, Python prints its traceback.
    """
    # Importing torch and diffusers makes nearly a million objects that live until the end. By default the garbage
    # collector would run a thousand times meanwhile and visit all objects again at exit: two seconds of every start.
    gc.set_threshold(GARBAGE_OBJECTS)
    atexit.register(gc.freeze)
    try:
        main()
    except KeyboardInterrupt as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        kept = f". {error}" if str(error) else ""
        print(f"\ninterrupted{kept} ({TRACEBACK_VARIABLE}=1 shows where)", file=sys.stderr)
        sys.exit(130)  # the status that a shell reports after Ctrl-C
    except INPUT_ERRORS as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}:{frame.lineno}"
        print(f"error: {_message(error)}\n({place}; {TRACEBACK_VARIABLE}=1 shows the traceback)", file=sys.stderr)
        sys.exit(2)


def _message(error: BaseException) -> str:
    text = str(error)
    if "\nOriginal Traceback" in text:  # torch puts the traceback of a data loader's process into the message
        text = text.rstrip().rpartition("\n")[2]
    return text
