"""What is said where PyTorch is missing; needs none itself."""

import subprocess
import sys

CODE = """
import sys
sys.modules["torch"] = None
try:
    import topiarist.pruning.dppnet.layer
except ModuleNotFoundError as error:
    print(error)
"""


def test_message_names_the_extra():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert 'pip install "topiarist[train]"' in done.stdout
