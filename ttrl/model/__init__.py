"""Models as the engines and trainers need them. Importing a module of this package imports torch."""
