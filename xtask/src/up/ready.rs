//! Asks `/readyz`, by hand: one request and one status line need no HTTP client.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::addresses::reachable;

/// Whether the policy API at `address` answers that requests are served.
pub(super) fn is_ready(address: SocketAddr) -> bool {
    ask(reachable(address)).is_ok_and(|status| status.starts_with(b"HTTP/1.") && status.ends_with(b" 200"))
}

fn ask(address: SocketAddr) -> std::io::Result<[u8; 12]> {
    let patience = Duration::from_secs(1);
    let mut stream = TcpStream::connect_timeout(&address, patience)?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    let request = format!("GET /readyz HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
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
        assert!(is_ready(answers("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")));
        assert!(!is_ready(answers("HTTP/1.1 503 Service Unavailable\r\n\r\n")));
        assert!(!is_ready(answers("HTTP")));
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(!is_ready(closed));
    }
}
