all: ; @$(COMMAND)
