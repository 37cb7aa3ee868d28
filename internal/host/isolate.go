package host

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"ringwall/internal/errs"
)

// isolation is the table that cuts a host off. It is ours alone.
const isolation = "ringwall_isolation"

// Isolate lets this machine talk over IP to itself and to these addresses by TCP
// only, or, without any, to everyone again. It replaces what it set before in one
// step, so that it can be called again at any time; the rules outlive the process.
//
// What keeps the link itself alive passes: ARP, neighbour discovery, and DHCP from
// client to server, without which the address runs out and nobody can release the
// host any more. Forwarded traffic (of containers and guests) is cut as well.
// Other address families than IPv4 and IPv6 are not touched.
//
// It fails open: an error means that the host is not isolated, or not by the new
// rules. errs.Unsupported is a kernel without nftables.
func Isolate(_ context.Context, to []netip.AddrPort) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("isolate: %w: %w", err, errs.Unsupported)
	}
	t := &nftables.Table{Name: isolation, Family: nftables.TableFamilyINet}
	c.AddTable(t) // so that there is one to delete
	c.DelTable(t)
	if len(to) > 0 {
		isolate(c, c.AddTable(t), to)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("isolate: %w", err)
	}
	return nil
}

// isolate adds the rules: everything is dropped but what they name.
func isolate(c *nftables.Conn, t *nftables.Table, to []netip.AddrPort) {
	drop := nftables.ChainPolicyDrop
	chain := func(name string, hook *nftables.ChainHook) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Name: name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityRef(-300), Policy: &drop})
	}
	in, out := chain("input", nftables.ChainHookInput), chain("output", nftables.ChainHookOutput)
	chain("forward", nftables.ChainHookForward)
	pass := func(to *nftables.Chain, match ...expr.Any) {
		c.AddRule(&nftables.Rule{Table: t, Chain: to, Exprs: append(match, &expr.Verdict{Kind: expr.VerdictAccept})})
	}
	loopback := append([]byte("lo"), make([]byte, unix.IFNAMSIZ-2)...)
	pass(in, meta(expr.MetaKeyIIFNAME), equal(loopback))
	pass(out, meta(expr.MetaKeyOIFNAME), equal(loopback))
	for _, a := range to {
		pass(out, peer(a, true)...)
		pass(in, peer(a, false)...)
	}
	// neighbour and router discovery: ICMPv6 types 133 to 136
	for _, ch := range []*nftables.Chain{in, out} {
		pass(ch, meta(expr.MetaKeyL4PROTO), equal([]byte{unix.IPPROTO_ICMPV6}), field(0, 1),
			&expr.Range{Op: expr.CmpOpEq, Register: 1, FromData: []byte{133}, ToData: []byte{136}})
	}
	// DHCP, for IPv4 and IPv6
	for _, p := range [][2]uint16{{68, 67}, {546, 547}} {
		pass(out, ports(unix.IPPROTO_UDP, p[0], p[1])...)
		pass(in, ports(unix.IPPROTO_UDP, p[1], p[0])...)
	}
}

// peer matches the traffic with one TCP port of one address.
func peer(a netip.AddrPort, out bool) []expr.Any {
	ip := a.Addr().Unmap()
	family, offset := byte(unix.NFPROTO_IPV4), uint32(12) // source address (RFC 791)
	if ip.Is6() {
		family, offset = unix.NFPROTO_IPV6, 8 // RFC 8200
	}
	size := uint32(len(ip.AsSlice())) //nolint:gosec // 4 or 16
	port := uint32(0)                 // source port (RFC 9293)
	if out {
		offset, port = offset+size, 2
	}
	return []expr.Any{
		meta(expr.MetaKeyNFPROTO), equal([]byte{family}),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}, equal(ip.AsSlice()),
		meta(expr.MetaKeyL4PROTO), equal([]byte{unix.IPPROTO_TCP}),
		field(port, 2), equal(binary.BigEndian.AppendUint16(nil, a.Port())),
	}
}

// ports matches both ports of a protocol.
func ports(protocol byte, from, to uint16) []expr.Any {
	return []expr.Any{
		meta(expr.MetaKeyL4PROTO), equal([]byte{protocol}),
		field(0, 2), equal(binary.BigEndian.AppendUint16(nil, from)),
		field(2, 2), equal(binary.BigEndian.AppendUint16(nil, to)),
	}
}

func meta(k expr.MetaKey) expr.Any { return &expr.Meta{Key: k, Register: 1} }

func equal(b []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: b} }

func field(offset, size uint32) expr.Any {
	return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: size}
}
