module example.org/edged

go 1.26
