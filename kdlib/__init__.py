"""kdlib: the library behind a book on learning-to-teach knowledge distillation for BERT.

No room is imported here on purpose: every chapter names the one it uses (`from kdlib import losses`).
"""

import os
import warnings

# Who reads a book is nobody's business.  Set the variable to 0 before the first import if you want to be counted.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# tqdm, which other libraries import, misses ipywidgets in a notebook; our bars are text and do not.
warnings.filterwarnings("ignore", message="IProgress not found")

__version__ = "0.1.0"
