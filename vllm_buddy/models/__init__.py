"""Base models: an ordinary model folder, and the real model that comes through a package registry."""
