#!/bin/sh
# A Debian system whose whole userland is authorised by package trust lives
# under enforcement. Run by userland_test.go in a guest; RINGWALL_BOOT counts
# the boots. Each line "ok …" or "FAIL …" is a result; the last boot ends with 0
# if there was no FAIL.
set -u
prepared=/payload/prepared
fails=0
ok() { printf 'ok    %s\n' "$*"; }
bad() {
	printf 'FAIL  %s\n' "$*"
	fails=$((fails + 1))
}
# works TITLE COMMAND…
works() {
	title=$1
	shift
	if "$@" >/root/out 2>&1; then ok "$title"; else
		bad "$title: $(tail -n 3 /root/out | tr '\n' ' ' | cut -c1-300)"
	fi
}
wait_for_agent() {
	i=0
	until ringwall status >/dev/null 2>&1; do
		i=$((i + 1))
		[ $i -lt 300 ] || { bad "the agent does not enforce"; ringwall status; journalctl -u ringwall-agent -n 30 --no-pager; exit 1; }
		sleep 1
	done
}

case ${RINGWALL_BOOT:-1} in
1)
	cp /payload/parts/ringwall /usr/bin/ringwall
	cp -a "$prepared/state" /var/lib/ringwall
	works "install the unit and the hooks" ringwall host install
	systemctl daemon-reload
	systemctl start --no-block ringwall-agent
	wait_for_agent
	# from the next boot on the harness itself has to be allowed to start
	{ cat "$prepared/demo.yaml" && printf '  - rule: harness\n    sha256: [%s, %s]\n    kinds: [exec, library, script]\n' \
		"$(sha256sum <"$RINGWALL_RUNNER" | cut -c1-64)" "$(sha256sum <"$0" | cut -c1-64)"; } | sed 's/^epoch: 2$/epoch: 3/' >/root/next.yaml
	works "sign the next policy" ringwall policy sign /root/next.yaml --keys "$prepared/keys" -o /root/next.policy.json
	works "apply it" ringwall host apply /root/next.policy.json
	[ $fails = 0 ] || exit 1
	sync
	exit "$RINGWALL_REBOOT"
	;;
esac

wait_for_agent
ringwall status | head -n 6
works "it enforces from boot on, by systemd" systemctl is-active ringwall-agent
up=$(systemctl show -p ActiveEnterTimestampMonotonic --value ringwall-agent)
ok "enforcing $((up / 1000)) ms after the kernel started"
works "no unit failed" sh -c 'test -z "$(systemctl list-units --failed --no-legend --plain)" || { systemctl list-units --failed --no-legend --plain; exit 1; }'
works "coreutils and pipes" sh -c 'ls -lR /etc | grep conf | sort | head -n 5 | wc -l'
works "python3" python3 -c 'import json, sqlite3, ssl, ctypes, subprocess; subprocess.check_call(["true"])'
works "perl" perl -MPOSIX -e 'print POSIX::floor(1.5)'
works "apt-get install, unpacked and configured by dpkg" apt-get install -y --no-download hello jq bc tree
works "what it installed runs" sh -c 'hello && echo "{}" | jq . && echo 1+1 | bc && tree -L 1 /'
works "apt-get purge" apt-get purge -y hello
works "reinstall python's minimal package" sh -c 'ls /var/cache/apt/archives/python3-minimal*.deb 2>/dev/null | head -n 1 | xargs -r dpkg -i'
mkdir -p /root/c && cd /root/c || exit 1
printf '#include <stdio.h>\nint main(void) { puts("hi"); return 0; }\n' >a.c
works "gcc compiles and links" gcc -O2 -o a a.c
if ./a 2>/dev/null; then bad "what gcc made runs without a signature"; else ok "what gcc made does not run: nobody signed it"; fi
works "make" sh -c 'printf "b: a.c\n\tgcc -o b a.c\n" >Makefile && make b'
if command -v node >/dev/null; then works "node compiles at run time (JIT exception)" node -e 'let f = 0; for (let i = 0; i < 3e6; i++) f += i % 7; console.log(f)'; fi
if command -v go >/dev/null; then
	mkdir -p /root/g && cd /root/g && printf 'package main\nfunc main() { println("hi") }\n' >m.go
	works "go build" sh -c 'GOCACHE=/root/gc GOFLAGS=-mod=mod go build -o m m.go'
fi
if command -v runc >/dev/null; then
	mkdir -p /root/ctr/rootfs && cd /root/ctr || exit 1
	cp -a /bin /lib /lib64 /usr rootfs/ 2>/dev/null
	runc spec && sed -i 's/"terminal": true/"terminal": false/; s#"sh"#"/bin/ls", "/"#' config.json
	works "a container of authorised content" runc run ctr1
	cp /root/c/a rootfs/evil && sed -i 's#"/bin/ls", "/"#"/evil"#' config.json
	if runc run ctr2 >/root/out 2>&1; then bad "an unsigned program in a container ran"; else ok "an unsigned program in a container does not run"; fi
fi
works "systemctl restart nginx" systemctl restart nginx
works "log in the journal" sh -c 'logger -t e2e hello && journalctl -t e2e -n 1 --no-pager | grep hello'
ringwall events --blocks --output json | grep -v '"path":"/root/c/a"\|rootfs/evil' >/root/blocks || true
if [ -s /root/blocks ]; then
	bad "false denials:"
	ringwall events --blocks | tail -n 60
else
	ok "not one false denial"
fi
printf '%d failed\n' $fails
[ $fails = 0 ]
