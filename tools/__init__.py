"""What the Makefile calls: set up, execute the book, build the site, check everything.  Not part of kdlib."""
