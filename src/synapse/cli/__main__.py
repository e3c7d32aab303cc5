"""`python -m synapse.cli`: the same as the `synapse` command."""

from synapse.cli.app import main

if __name__ == "__main__":
    main()
