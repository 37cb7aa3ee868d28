// Package identity is how people prove who they are to the server itself:
// passwords, the keys and tokens of the built-in issuer (OpenID Connect Core
// 1.0), codes that are typed on another device (RFC 8628) and the proof of who
// began a sign-on (PKCE, RFC 7636). It does no I/O and keeps nothing.
package identity
