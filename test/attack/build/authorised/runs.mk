all: ; @true
