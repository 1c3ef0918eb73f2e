#!/bin/sh
# Certificates for trying out deploy/tls/: a CA of your own, a server's and robots' certificates signed by it.
#
#   make_test_ca.sh FOLDER ca                     the CA: ca.pem, ca.key (once)
#   make_test_ca.sh FOLDER server HOST [HOST...]  server.pem, for these names or addresses
#   make_test_ca.sh FOLDER robot ROBOT_ID         ROBOT_ID.pem and ROBOT_ID.key: whoever holds them is that robot
#
# For a real site use the site's CA: what matters is that a robot's certificate has the robot_id as its common name.
set -eu
umask 077
[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1 what=$2
shift 2
mkdir -p "$folder"
cd "$folder"

key() { openssl ecparam -name prime256v1 -genkey -noout -out "$1"; }
sign() { # name, common name, extensions
    key "$1.key"
    openssl req -new -key "$1.key" -subj "/CN=$2" |
        openssl x509 -req -CA ca.pem -CAkey ca.key -CAcreateserial -days 365 -sha256 -extfile "$3" -out "$1.pem" 2>/dev/null
    rm -f "$3"
}

case $what in
ca)
    [ -e ca.key ] && { echo "$folder/ca.key is there already; robots trust it. Remove it to begin anew" >&2; exit 1; }
    key ca.key
    openssl req -x509 -new -key ca.key -sha256 -days 3650 -subj "/CN=vla-dist test CA" -out ca.pem \
        -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign"
    ;;
server)
    [ $# -ge 1 ] || { echo "name at least one host" >&2; exit 2; }
    names=""
    for host in "$@"; do
        case $host in
        *[!0-9.]*) names="$names,DNS:$host" ;;
        *) names="$names,IP:$host" ;;
        esac
    done
    printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\nkeyUsage=critical,digitalSignature\n' "${names#,}" >server.ext
    sign server "$1" server.ext
    cat server.key >>server.pem
    rm server.key
    ;;
robot)
    [ $# -eq 1 ] || { echo "name one robot" >&2; exit 2; }
    case $1 in "" | *[!A-Za-z0-9._-]*) echo "a robot_id here is letters, digits, '.', '_' and '-'" >&2; exit 2 ;; esac
    printf 'extendedKeyUsage=clientAuth\nkeyUsage=critical,digitalSignature\n' >"$1.ext"
    sign "$1" "$1" "$1.ext"
    ;;
*)
    echo "no verb '$what'; the verbs are ca, server, robot" >&2
    exit 2
    ;;
esac
