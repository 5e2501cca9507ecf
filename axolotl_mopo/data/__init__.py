"""Turn a raw data set into canonical rows and token ids."""
