//! Asks whether a service is ready, by hand: one request and one status line need no HTTP client.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// Whether `GET path` at `address` is answered 200.
pub(crate) fn is_ready(address: SocketAddr, path: &str) -> bool {
    ask(reachable(address), path)
        .is_ok_and(|status| status.starts_with(b"HTTP/1.") && status.ends_with(b" 200"))
}

/// The address to reach a listener at: "any" is no address to connect to.
pub(crate) fn reachable(address: SocketAddr) -> SocketAddr {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, address.port())
}

fn ask(address: SocketAddr, path: &str) -> std::io::Result<[u8; 12]> {
    let patience = Duration::from_secs(1);
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut status = [0; 12];
    stream.read_exact(&mut status)?;
    Ok(status)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn answers(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let _read = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        address
    }

    #[test]
    fn only_a_200_is_ready() {
        let ready = |answer| is_ready(answers(answer), "/readyz");
        assert!(ready("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"));
        assert!(!ready("HTTP/1.1 503 Service Unavailable\r\n\r\n"));
        assert!(!ready("HTTP"));
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(!is_ready(closed, "/readyz"));
    }

    #[test]
    fn any_is_reached_at_loopback() {
        let at = |text: &str| reachable(text.parse().unwrap()).to_string();
        assert_eq!(at("0.0.0.0:81"), "127.0.0.1:81");
        assert_eq!(at("[::]:82"), "[::1]:82");
        assert_eq!(at("10.0.0.1:83"), "10.0.0.1:83");
    }
}
