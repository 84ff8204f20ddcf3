"""Converts an engine's checkpoint into DeepSpeed's universal format, which any number of ranks can load.

A process of its own, `python -m expo.learner.universal --input_folder A --output_folder B`: it starts workers, and
neither they nor the messages of the conversion belong into the processes of a run.
"""

import multiprocessing
import pickle
import sys

from expo.learner._compat_deepspeed import convert_to_universal, load_deepspeed
from expo.runtime.safe_load import weights_only_loading

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")  # workers inherit the list of classes that may be loaded
    load_deepspeed()
    try:
        with weights_only_loading():
            convert_to_universal(sys.argv[1:])
    except pickle.UnpicklingError:
        sys.exit("its files hold more than data")
