all: ;
