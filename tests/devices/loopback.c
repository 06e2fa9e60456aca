/* Preloaded into adbd, which would listen on every address of the machine, without authentication:
 * a bind to all addresses becomes one to the loopback, and there are no virtual machine sockets.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

int bind(int socket, const struct sockaddr *address, socklen_t length) {
  if (address->sa_family == AF_INET) {
    struct sockaddr_in to;
    memcpy(&to, address, sizeof to);
    if (to.sin_addr.s_addr == INADDR_ANY) to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return (int)syscall(SYS_bind, socket, &to, sizeof to);
  }
  if (address->sa_family == AF_INET6) {
    struct sockaddr_in6 to;
    memcpy(&to, address, sizeof to);
    if (IN6_IS_ADDR_UNSPECIFIED(&to.sin6_addr)) { /* 127.0.0.1, mapped: clients use IPv4 */
      memset(&to.sin6_addr, 0, sizeof to.sin6_addr);
      to.sin6_addr.s6_addr[10] = to.sin6_addr.s6_addr[11] = 0xff;
      to.sin6_addr.s6_addr[12] = 127;
      to.sin6_addr.s6_addr[15] = 1;
    }
    return (int)syscall(SYS_bind, socket, &to, sizeof to);
  }
  if (address->sa_family == AF_VSOCK) {
    errno = EAFNOSUPPORT;
    return -1;
  }
  return (int)syscall(SYS_bind, socket, address, length);
}
