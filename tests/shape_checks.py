"""The checker of shapes and types in signatures that the tests switch on."""

from beartype import BeartypeConf, beartype

# An int where a float is asked for is right, as type checkers have it (PEP 484).
check = beartype(conf=BeartypeConf(is_pep484_tower=True))
