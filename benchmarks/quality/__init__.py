"""Quality against speed, drawn from results files."""
