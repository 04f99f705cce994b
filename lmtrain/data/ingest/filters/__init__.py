"""What may be left out of a text source before it is tokenized: a file per rule, each a function of the text alone."""
