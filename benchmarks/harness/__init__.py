"""Code that the benchmarks share: engines, servers, rounds, results files, and the check of outputs before timing."""
