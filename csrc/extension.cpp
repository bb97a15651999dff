// The library with its Python module, likewise as one translation unit (library.cpp).
#include "library.cpp"
#include "module.cpp"
