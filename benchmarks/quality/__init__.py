"""Quality against speed, from results files."""
