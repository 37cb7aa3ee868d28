# Opens, reads and closes a file that is not code, $2 times.
i=0
while [ $i -lt "$2" ]; do
	read -r line <"$1"
	i=$((i + 1))
done
