"""The C++ example, packaged: `topiarist verify --emulate` builds it, `targets runtime -o` copies it."""
