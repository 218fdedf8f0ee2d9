"""What benchmarks share: engines, servers, rounds, results files, and the check of what is timed."""
