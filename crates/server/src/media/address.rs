//! Which addresses are public: an image must never be fetched from inside the operator's network.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::LazyLock,
};

use ipnet::{Ipv4Net, Ipv6Net};

/// Not for the public internet, by the registries of special-purpose addresses (RFC 6890 and its
/// followers).
const SPECIAL_V4: &[(&str, &str)] = &[
    ("0.0.0.0/8", "this network"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "shared by carriers"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local, and the metadata services of clouds"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "protocol assignments"),
    ("192.0.2.0/24", "documentation"),
    ("192.31.196.0/24", "anycast of name services"),
    ("192.52.193.0/24", "anycast of tunnels"),
    ("192.88.99.0/24", "relays of 6to4"),
    ("192.168.0.0/16", "private"),
    ("192.175.48.0/24", "anycast of name services"),
    ("198.18.0.0/15", "benchmarks"),
    ("198.51.100.0/24", "documentation"),
    ("203.0.113.0/24", "documentation"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved, and broadcast"),
];

/// Inside `2000::/3`, the only part of IPv6 that is public at all: loopback, local and multicast
/// addresses lie outside, and so do those that embed an IPv4 address, 6to4 apart.
const SPECIAL_V6: &[(&str, &str)] = &[
    ("2001::/23", "protocol assignments, Teredo among them"),
    ("2001:db8::/32", "documentation"),
    ("2002::/16", "6to4"),
    ("2620:4f:8000::/48", "anycast of name services"),
    ("3fff::/20", "documentation"),
];

fn nets<N: std::str::FromStr>(rows: &[(&str, &str)]) -> Vec<N> {
    // A test counts them.
    rows.iter().filter_map(|(net, _)| net.parse().ok()).collect()
}

static SPECIAL_V4_NETS: LazyLock<Vec<Ipv4Net>> = LazyLock::new(|| nets(SPECIAL_V4));
static SPECIAL_V6_NETS: LazyLock<Vec<Ipv6Net>> = LazyLock::new(|| nets(SPECIAL_V6));

/// Whether an address belongs to the public internet. IPv6 addresses that stand for an IPv4 one
/// (compatible, mapped, translated, 6to4) are refused whatever they stand for: names have both kinds.
pub(super) fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    !SPECIAL_V4_NETS.iter().any(|net| net.contains(&address))
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let is_global_unicast = address.segments()[0] & 0xe000 == 0x2000;
    is_global_unicast && !SPECIAL_V6_NETS.iter().any(|net| net.contains(&address))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_nets_are_read() {
        assert_eq!(SPECIAL_V4_NETS.len(), SPECIAL_V4.len());
        assert_eq!(SPECIAL_V6_NETS.len(), SPECIAL_V6.len());
    }

    #[test]
    fn a_table_of_addresses() {
        let public = [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "93.184.216.34",
            "100.63.255.255",
            "100.128.0.0",
            "126.255.255.255",
            "128.0.0.0",
            "169.253.255.255",
            "169.255.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.167.255.255",
            "192.169.0.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "2606:4700:4700::1111",
            "2a00:1450:4001:81b::200e",
            "2001:4860:4860::8888",
            "2400:cb00::1",
        ];
        let special = [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            // Unspecified, loopback, link-local, unique-local, site-local, multicast, discard.
            "::",
            "::1",
            "fe80::1",
            "fc00::1",
            "fd12:3456::1",
            "fec0::1",
            "ff02::1",
            "100::1",
            // Compatible, mapped, translated: also where the IPv4 address would be public.
            "::127.0.0.1",
            "::8.8.8.8",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::ffff:8.8.8.8",
            "::ffff:0:127.0.0.1",
            "64:ff9b::127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "64:ff9b:1::1",
            // 6to4 and Teredo.
            "2002:7f00:1::",
            "2002:a00:1::1",
            "2001::1",
            "2001:0:7f00:1::",
            "2001:db8::1",
            "3fff::1",
        ];
        for (addresses, wanted) in [(&public[..], true), (&special[..], false)] {
            for text in addresses {
                assert_eq!(is_public(text.parse().expect("an address")), wanted, "{text}");
            }
        }
    }

    proptest! {
        /// The standard library's opinion, where it has one.
        #[test]
        fn never_more_than_the_standard_library(bits in any::<u32>(), long in any::<u128>()) {
            let address = Ipv4Addr::from_bits(bits);
            if is_public(address.into()) {
                prop_assert!(!address.is_private() && !address.is_loopback() && !address.is_link_local());
                prop_assert!(!address.is_multicast() && !address.is_documentation() && !address.is_broadcast());
            }
            prop_assert!(!is_public(address.to_ipv6_mapped().into()) && !is_public(address.to_ipv6_compatible().into()));
            let address = Ipv6Addr::from_bits(long);
            if is_public(address.into()) {
                prop_assert!(!address.is_loopback() && !address.is_multicast() && !address.is_unique_local());
                prop_assert!(!address.is_unicast_link_local() && address.to_ipv4_mapped().is_none());
            }
        }
    }
}
