"""From documents to samples: windows, masks, blends, and the order in which all layouts read them."""
