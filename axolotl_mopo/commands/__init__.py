"""`axolotl mopo init` and `axolotl mopo smoke`: write a configuration for some data, and try a configuration."""
