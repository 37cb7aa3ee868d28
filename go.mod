module ringwall

go 1.26
