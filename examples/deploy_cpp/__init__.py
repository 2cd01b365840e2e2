"""The C++ example as a package: `verify --emulate` builds it, `targets runtime` copies it."""
