load $(LIB)
all: ;
