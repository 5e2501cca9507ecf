"""Raw data set -> canonical row -> token ids."""
