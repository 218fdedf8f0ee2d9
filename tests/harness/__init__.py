"""Code that tests share: tiny models, in-process engines and a bookkeeping worker. README.md describes it."""
