"""kdlib: the library behind a book on learning-to-teach knowledge distillation for BERT.

Nothing is imported here on purpose: every chapter names the room it uses (`from kdlib import losses`).
"""

__version__ = "0.1.0"
