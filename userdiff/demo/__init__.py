"""The bundled checkpoint: ten users, user k writes the digit k - 1; `python -m userdiff.demo.train` makes it again."""
