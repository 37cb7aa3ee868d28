# A Debian system whose whole userland is authorised by package trust lives
# under enforcement. Run by userland_test.go in a guest, after start.sh.
if [ "$RINGWALL_BOOT" = 1 ]; then
	set_up
	restart_guest
fi

wait_for_agent
ringwall status | head -n 6
works "it enforces from boot on, by systemd" systemctl is-active ringwall-agent
if [ "$(systemctl show -p NRestarts --value ringwall-agent)" = 0 ]; then
	ok "the agent started at once"
else
	bad "the agent started again: $(journalctl -u ringwall-agent -b --no-pager | grep -m 3 -i 'error\|fail' | cut -c1-600)"
fi
up=$(systemctl show -p ActiveEnterTimestampMonotonic --value ringwall-agent)
ok "enforcing $((up / 1000)) ms after the kernel started"
# Python's byte code: made on the host, so nobody but the agent vouches for it
compiled() { ringwall status | grep '^byte code.*: [1-9][0-9]* modules' | grep -qv 'to be compiled\|waiting\|off:'; }
i=0
until compiled || [ $i -gt 240 ]; do
	i=$((i + 1))
	sleep 5
done
if compiled; then ok "$(ringwall status | grep '^byte code') after $(now) s"; else bad "byte code: $(ringwall status | grep '^byte code')"; fi
pyc=$(echo /usr/lib/python3.*/json/__pycache__/__init__.cpython-*[0-9].pyc)
uses_bytecode() { python3 -v -c 'import json' 2>&1 | grep -q "code object from '$pyc'"; }
works "python3 reads byte code that the agent made" uses_bytecode
cp "$pyc" /root/good.pyc
sed 's/JSONDecoder/JSONDecodes/' /root/good.pyc >/root/bad.pyc
cp /root/bad.pyc "$pyc.new" && mv "$pyc.new" "$pyc"
refused "byte code that root made is not read" uses_bytecode
i=0
until cmp -s "$pyc" /root/good.pyc || [ $i -gt 60 ]; do
	i=$((i + 1))
	sleep 2
done
works "the agent puts it right" cmp "$pyc" /root/good.pyc
works "and it is read again" uses_bytecode
works "no unit failed" sh -c 'x=$(systemctl list-units --failed --no-legend --plain); echo "$x"; test -z "$x"'

works "coreutils and pipes" sh -c 'ls -lR /etc | grep conf | sort | head -n 5 | wc -l'
works "python3" python3 -c 'import json, sqlite3, ssl, ctypes, subprocess; subprocess.check_call(["true"])'
works "perl" perl -MPOSIX -e 'print POSIX::floor(1.5)'
works "lua" lua5.4 -e 'print(1)'
works "awk" sh -c 'gawk "BEGIN { print 1 }" && mawk "BEGIN { print 1 }"'
works "node compiles at run time (JIT exception)" node -e 'let f = 0; for (let i = 0; i < 3e6; i++) f += i % 7; console.log(f)'
works "gdb" gdb -nx -batch -ex 'print 6*7'
works "systemctl restart nginx" systemctl restart nginx
works "log in the journal" sh -c 'logger -t e2e hello && journalctl -t e2e -n 1 --no-pager | grep hello'
works "udev" sh -c 'udevadm trigger && udevadm settle'
works "systemd-run" systemd-run --wait --quiet /bin/true

works "apt-get install, unpacked and configured by dpkg" apt-get install -y --no-download hello jq bc tree
works "what it installed runs" sh -c 'hello && echo "{}" | jq . && echo 1+1 | bc && tree -L 1 /'
works "apt-get purge" apt-get purge -y hello
# its maintainer scripts call python3 and py3compile
works "reinstall python3" apt-get install -y --no-download --reinstall python3-minimal python3

mkdir -p /root/c && cd /root/c || exit 1
printf '#include <stdio.h>\nint main(void) { puts("hi"); return 0; }\n' >a.c
works "gcc compiles and links" gcc -O2 -o a a.c
refused "what gcc made does not run: nobody signed it" ./a
works "make" sh -c 'printf "b: a.c\n\tgcc -o b a.c\n" >Makefile && make b'
if command -v go >/dev/null; then
	mkdir -p /root/g && cd /root/g && printf 'module m\n' >go.mod && printf 'package main\nfunc main() { println("hi") }\n' >m.go
	works "go build" env GOCACHE=/root/gc GOFLAGS=-mod=mod go build -o m m.go
	refused "what go built does not run" ./m
fi

mkdir -p /root/ctr/rootfs/proc && cd /root/ctr || exit 1
for f in /bin/ls /bin/sh $(ldd /bin/ls /bin/sh | grep -o '/[^ :]*'); do cp -L --parents "$f" rootfs/ 2>/dev/null; done
cp /root/c/a rootfs/evil
runc spec >/run/out 2>&1
# contain COMMAND NAME: the words of a JSON list. With the service manager's help,
# as container engines on Debian do it.
contain() {
	rm -rf "$2"
	sed -e 's/"terminal": true/"terminal": false/' -e "s#\"sh\"#$1#" -e "s#\"linux\": {#&\"cgroupsPath\": \"system.slice:e2e:$2\",#" config.json >config.new && mkdir -p "$2" && mv config.new "$2/config.json" && cp -a rootfs "$2/"
	runc --systemd-cgroup run --bundle "$2" "$2"
}
works "a container of authorised content" contain '"/bin/ls", "/"' ctr1
refused "an unsigned program in a container does not run" contain '"/evil"' ctr2
works "it was Ringwall that refused it" sh -c 'sleep 3; ringwall events --blocks --output json | grep /evil | grep -q unlisted'

# Refusals that were meant. Python's own byte code, made on this host, is in no
# package: it is skipped without a word, and an import reads the source.
sleep 3
ringwall events --blocks --output json | grep -v '"path":"/root/c/a"\|"path":"/root/g/m"\|"path":"[^"]*/evil"' >/root/false || true
if [ -s /root/false ]; then
	bad "false denials: $(wc -l </root/false)"
	head -n 40 /root/false
else
	ok "not one false denial"
fi
ringwall events | grep -v BLOCK | grep 'NOTE!\|GAP\|AUDIT' | sort | uniq -c | sort -rn | head -n 20
printf '%d failed\n' $fails
[ $fails = 0 ]
