"""The commands of ``align`` that have a module of their own."""
