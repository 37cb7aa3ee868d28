// Package attest decides what a host's TPM evidence proves.
//
// It is pure: bytes in, facts and verdicts out, no I/O and no clock of its
// own. Everything that a host sends is hostile until the quote covers it:
//
//   - ParseLog and ParseUserspaceLog read the boot's event logs, ParseIMA the
//     kernel's measurement list. What they return are claims.
//   - VerifyQuote checks the signature of the TPM, the challenge and the
//     selection of PCRs, and gives the values that the TPM vouches for.
//   - Replay demands that the logs lead from the power-on values to the quoted
//     value of every PCR of the bank. An event's data is then handed out only
//     where its digest was recomputed from it (Event.Measured).
//   - Appraise runs a policy's named checks over what is left and makes a
//     Result, which is signed and can be recomputed from an archive.
//
// Every check fails closed: evidence that is missing, or that cannot be read,
// is a failure with its own Reason and never a pass.
package attest
