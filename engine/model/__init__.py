"""Models as lists of layers: the pipeline cuts the list, one rank runs it whole."""
