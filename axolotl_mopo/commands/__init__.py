"""`axolotl mopo init` and `axolotl mopo smoke`: write a configuration for a data set, and test a configuration."""
