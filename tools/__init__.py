"""What the Makefile calls (set up, execute, build, check), and the grammar of MiniGLUE.  Not part of kdlib."""
