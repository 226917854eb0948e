"""``python -m synthbrain``, which ``torchrun -m synthbrain`` starts too."""

from synthbrain.cli import main

if __name__ == "__main__":
    main()
